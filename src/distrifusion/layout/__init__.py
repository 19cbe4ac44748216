"""Who does what, as integers: bands of rows, components of a chain of layers, ranks of a plan."""
