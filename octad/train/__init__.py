"""What training is made of; called, octad.train(config, output) trains."""
