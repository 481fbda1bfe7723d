"""Any rows become exactly labelled examples: sources → formats → template → report → collate."""
