"""Sizing: from rates, prices and a number of images to nodes, hours and cost. No Ray, no torch."""
