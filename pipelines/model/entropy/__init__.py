"""What the latents cost in bits, and the exact probabilities that a file of them is coded with."""
