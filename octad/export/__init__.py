"""Other engines' forms of a model; called, octad.export(model, output) writes one."""
