"""Rules between settings, one file for each part of a configuration; `validation` checks them all."""
