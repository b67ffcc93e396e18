"""Sizing: from rates, prices and a number of images to nodes, hours and cost. Pure functions, no Ray, no torch."""
