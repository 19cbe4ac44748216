"""`python -m distrifusion` is the command `distrifusion`."""

from distrifusion.cli import app

if __name__ == "__main__":
    app(prog_name="distrifusion")
