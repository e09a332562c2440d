"""The folder that an export makes: manifest, files, checks, and how files get there."""
