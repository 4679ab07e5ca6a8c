"""When: which stage follows which."""
