"""What is done with a trained network: embed images, export, describe."""
