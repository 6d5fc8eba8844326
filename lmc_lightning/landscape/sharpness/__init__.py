"""How far the loss rises around a point: along ascents, under noise, along an update."""
