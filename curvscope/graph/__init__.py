"""Any model as one functional graph whose linear operations are modules."""
