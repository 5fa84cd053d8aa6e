"""The method: networks, losses, masking, training step, sampler. Imports nothing else of this
project.
"""
