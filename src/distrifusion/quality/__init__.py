"""How much a picture changed: figures and pictures of the difference."""
