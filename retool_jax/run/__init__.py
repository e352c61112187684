"""A run from the words of its command to the objects that it is made of."""
