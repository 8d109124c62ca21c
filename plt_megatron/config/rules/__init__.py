"""What settings ask of one another, one file for each part of a configuration; `validation` asks them all."""
