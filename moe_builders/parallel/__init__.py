"""The only folder that knows of processes: world, launch, sharding, global norm, DCP files."""
