"""How long inference takes: BlockDrop beside full ResNets, timed fairly."""
