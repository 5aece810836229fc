"""Seeing what happens: programs as text, dumps per pass, the report."""
