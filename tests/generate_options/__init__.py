"""Every option of generate(), alone and composed at random, on an attached model beside plain transformers."""
