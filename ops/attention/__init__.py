"""Softmax attention in every form, on one device and across ranks."""
