"""All that touches the device: the attack of a unit's images, and the count of what came out."""
