"""Model families and their bundled pipelines."""
