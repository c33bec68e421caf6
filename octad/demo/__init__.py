"""Eight real models to combine, and text to calibrate and judge on: see data/LICENCES.md and specialists/README.md."""
