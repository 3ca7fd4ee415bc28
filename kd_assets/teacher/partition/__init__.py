"""One partition through the teacher: its windows, batches, budgets, and the parts they become."""
