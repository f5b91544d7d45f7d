"""What is held: old skills, each by a retention mode that measures its loss and a constraint that keeps its budget."""
