"""C for the engine's step on a CPU, compiled on the machine it runs on: see runner.py."""
