"""Return decisions: may this order be sent back under the policy that holds today?"""
