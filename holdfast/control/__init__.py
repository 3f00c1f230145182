"""Robots: policies that act in environments, cloned from demonstrations and fine-tuned."""
