"""Convolutions along time: short ones with a state, and long ones by Fourier transform."""
