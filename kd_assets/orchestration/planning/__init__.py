"""What runs will do: the planned work of partitions, with its inputs, outputs and resources."""
