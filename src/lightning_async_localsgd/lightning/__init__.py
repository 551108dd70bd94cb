"""Everything that knows Lightning: the strategies, the callbacks, and the parts of the Trainer that they hold."""
