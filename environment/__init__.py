"""How bootstrap.py sets up an environment; the package itself needs none of it."""
