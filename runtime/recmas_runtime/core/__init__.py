"""What every other package stands on: errors, progress, files, the terminal."""
