"""What turns typing into ghost text: ours and its peers, behind one interface."""
