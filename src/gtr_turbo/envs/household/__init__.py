"""Household tasks: ALFWorld's text games on an engine, a generator and a renderer of our own."""
