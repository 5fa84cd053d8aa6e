"""Names in the folder of a latent cache, for those that read no records of it."""

METADATA_NAME, SHARDS_NAME = "metadata.json", "shards"
