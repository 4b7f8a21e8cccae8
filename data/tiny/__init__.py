"""What the embedded default needs and no download brings: a vocabulary of 768 pieces and the texts it is built from."""
