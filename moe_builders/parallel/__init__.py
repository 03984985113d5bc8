"""The only folder that knows of processes: world, sharding plan, global norm."""
