"""Planning: what to keep, rebuild and offload so that one step fits into a budget. The map is in `weft.memory`."""
