"""Reports written from a results folder alone: the HTML page, its figures, and tables for the terminal."""
