"""What files of texts, tables and tars hold, record by record: one reader a format."""
