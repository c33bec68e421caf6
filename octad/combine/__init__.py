"""What combining is made of; called, octad.combine(recipe, output) makes a mixture."""
