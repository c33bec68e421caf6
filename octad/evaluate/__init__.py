"""What judging is made of; called, octad.evaluate(model, data) gives a verdict."""
