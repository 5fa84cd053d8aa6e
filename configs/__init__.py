"""Configurations; each file has `get_config(variant)`."""
