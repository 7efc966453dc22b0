//! Scripts that the store runs.

use redis::{Cmd, ErrorKind, FromRedisValue, RedisResult, Script, ServerErrorKind, aio::ConnectionLike};

/// A script with its text.
pub(super) struct Lua {
    text: &'static str,
    hash: String,
}

impl Lua {
    pub fn new(text: &'static str) -> Lua {
        let hash = Script::new(text).get_hash().to_owned();
        Lua { text, hash }
    }

    /// Runs it. `fill` adds the number of keys, the keys and the arguments.
    ///
    /// A node that does not know it (it is new, or was told to forget) is sent the text. To load it would be a command for
    /// all nodes of a cluster, and fail when any of them is gone.
    pub async fn run<T: FromRedisValue>(
        &self,
        connection: &mut impl ConnectionLike,
        fill: impl Fn(&mut Cmd),
    ) -> RedisResult<T> {
        let mut by_hash = redis::cmd("EVALSHA");
        fill(by_hash.arg(&self.hash));
        match by_hash.query_async(connection).await {
            Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                let mut by_text = redis::cmd("EVAL");
                fill(by_text.arg(self.text));
                by_text.query_async(connection).await
            }
            result => result,
        }
    }
}
