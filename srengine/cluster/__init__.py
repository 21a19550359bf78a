"""What exists and where it should be: the catalog (database > table > partition > index > tablet > replica) and
placement.
"""
