"""What people read: tables, comparisons, and the exported model with its card."""
