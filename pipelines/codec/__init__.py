"""Images to files and back, with a trained codec."""
