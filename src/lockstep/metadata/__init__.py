# Who has how many tokens. Nothing is imported here: most of these modules are used without torch.
