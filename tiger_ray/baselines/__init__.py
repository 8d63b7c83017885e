"""What a user would take instead of generative retrieval, behind the same interface (`rankers.Ranker`).

Neighbours(embedding_ND, eligible_N)                           what is like their last item
Sasrec(model, torch.device("cpu"), eligible_N=eligible_N)      a transformer over item ids and inner products
"""
