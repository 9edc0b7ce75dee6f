//! Asking a running agent: what the commands `status`, `tunnel`, `reload`, `ready` and `stop` do.
//!
//! Enters: where the agent may be found. Leaves: its answers, or why there is none.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, time::timeout};

use super::{Refused, Stopping, socket};
use crate::{config::change::Change, report::status::Status};

/// An agent answers sooner than this, or not at all.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AskError {
    /// Nobody listens anywhere.
    #[error("no agent is running here (looked for {})", shown(.0))]
    NotRunning(Vec<PathBuf>),
    /// Somebody listens, but not to this user.
    #[error("{0}: permission denied: ask as the agent's user, a member of its group, or root")]
    Denied(PathBuf),
    /// The connection failed.
    #[error("the agent at {path} does not answer: {source}")]
    Broken {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The agent refused.
    #[error("{0}")]
    Refused(String),
    /// What was asked about does not exist.
    #[error("{0}")]
    NotFound(String),
    /// The edge would have to answer, and does not.
    #[error("{0}")]
    Unreachable(String),
    /// It cannot be done now; worth another try.
    #[error("{0}")]
    Busy(String),
}

impl AskError {
    /// Whether the same question may be answered in a moment.
    pub(crate) const fn may_pass(&self) -> bool {
        matches!(self, Self::Unreachable(_) | Self::Busy(_))
    }
}

fn shown(places: &[PathBuf]) -> String {
    places.iter().map(|place| place.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// Where to look for the agent, in this order.
pub(crate) fn places(
    named: Option<PathBuf>,
    state_dir: Option<&Path>,
    config: Option<&Path>,
    usual_state_dir: Option<&Path>,
    environment: impl Fn(&str) -> Option<PathBuf>,
    is_root: bool,
) -> Vec<PathBuf> {
    if let Some(named) = named {
        return vec![named];
    }
    if let Some(folder) = state_dir {
        return vec![socket::in_folder(folder)];
    }
    if let Some(named) = config.and_then(crate::config::control_socket_named_in) {
        return vec![named];
    }
    let mut places = socket::usual_places(environment, is_root);
    places.extend(usual_state_dir.map(socket::in_folder));
    places
}

/// Where agents that people have started are: `agentd http` has a socket of its own.
pub(crate) fn places_of_people(environment: impl Fn(&str) -> Option<PathBuf>) -> Vec<PathBuf> {
    let Some(folder) = environment("XDG_RUNTIME_DIR").map(|folder| folder.join("agentd")) else {
        return Vec::new();
    };
    let entries =
        std::fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    let mut places: Vec<_> = entries
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            name.starts_with("http-") && name.ends_with(".sock")
        })
        .collect();
    places.sort();
    places
}

/// The running agent.
pub(crate) struct Agent {
    path: PathBuf,
    sender: http1::SendRequest<Full<Bytes>>,
}

impl Agent {
    /// Finds the first that listens at one of `places`.
    ///
    /// # Errors
    ///
    /// [`AskError::NotRunning`] and [`AskError::Denied`].
    pub(crate) async fn find(places: &[PathBuf]) -> Result<Self, AskError> {
        let mut denied = None;
        for path in places {
            match UnixStream::connect(path).await {
                Ok(stream) => {
                    let broken =
                        |error| AskError::Broken { path: path.clone(), source: io::Error::other(error) };
                    let (sender, connection) =
                        http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
                    tokio::spawn(async move {
                        // Its errors reach whoever waits for the answer.
                        let _ = connection.await;
                    });
                    return Ok(Self { path: path.clone(), sender });
                }
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    denied.get_or_insert(path.clone());
                }
                Err(_) => {}
            }
        }
        Err(denied.map_or_else(|| AskError::NotRunning(places.to_vec()), AskError::Denied))
    }

    /// How it is.
    pub(crate) async fn status(&mut self) -> Result<Status, AskError> {
        self.status_within(PATIENCE).await
    }

    /// The same for who does not wait as long.
    pub(crate) async fn status_within(&mut self, patience: Duration) -> Result<Status, AskError> {
        self.ask(Method::GET, "/status", patience).await
    }

    /// Has it read its configuration again.
    pub(crate) async fn reload(&mut self) -> Result<Change, AskError> {
        self.ask(Method::POST, "/reload", PATIENCE).await
    }

    /// Has it stop.
    pub(crate) async fn stop(&mut self) -> Result<Stopping, AskError> {
        self.ask(Method::POST, "/stop", PATIENCE).await
    }

    /// Asks its inspector; `kind` is the media type of `body`.
    ///
    /// # Errors
    ///
    /// [`AskError::Refused`] with the inspector's reason.
    pub(crate) async fn inspect(
        &mut self,
        method: Method,
        path: &str,
        kind: &'static str,
        body: Vec<u8>,
    ) -> Result<Bytes, AskError> {
        let response = self.open(method, path, kind, body).await?;
        let collected = timeout(PATIENCE, response.collect()).await;
        let collected = collected.map_err(|_| self.broken(io::ErrorKind::TimedOut.into()))?;
        Ok(collected.map_err(|error| self.broken(io::Error::other(error)))?.to_bytes())
    }

    /// Asks its inspector for an answer that has no end.
    ///
    /// # Errors
    ///
    /// As [`Self::inspect`].
    pub(crate) async fn follow(&mut self, path: &str) -> Result<Incoming, AskError> {
        self.open(Method::GET, path, "text/plain", Vec::new()).await
    }

    async fn open(
        &mut self,
        method: Method,
        path: &str,
        kind: &'static str,
        body: Vec<u8>,
    ) -> Result<Incoming, AskError> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "localhost")
            .header(header::CONTENT_TYPE, kind)
            .body(Full::from(body))
            .map_err(|error| self.broken(io::Error::other(error)))?;
        // A detail may be waited for.
        let answered = timeout(2 * PATIENCE, self.sender.send_request(request)).await;
        let answered = answered.map_err(|_| self.broken(io::ErrorKind::TimedOut.into()))?;
        let (head, body) = answered.map_err(|error| self.broken(io::Error::other(error)))?.into_parts();
        if head.status.is_success() {
            return Ok(body);
        }
        let collected = timeout(PATIENCE, body.collect()).await;
        let body = collected.ok().and_then(Result::ok).map(|body| body.to_bytes()).unwrap_or_default();
        Err(match serde_json::from_slice::<Refused>(&body) {
            Ok(refused) => match head.status {
                StatusCode::NOT_FOUND => AskError::NotFound(refused.error),
                StatusCode::BAD_GATEWAY => AskError::Unreachable(refused.error),
                StatusCode::SERVICE_UNAVAILABLE => AskError::Busy(refused.error),
                _ => AskError::Refused(refused.error),
            },
            // An agent from before it had an inspector.
            Err(_) => self.broken(io::Error::other(String::from_utf8_lossy(&body).trim().to_owned())),
        })
    }

    fn broken(&self, source: io::Error) -> AskError {
        AskError::Broken { path: self.path.clone(), source }
    }

    async fn ask<T: serde::de::DeserializeOwned>(
        &mut self,
        method: Method,
        path: &str,
        patience: Duration,
    ) -> Result<T, AskError> {
        let broken = |source| AskError::Broken { path: self.path.clone(), source };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "localhost")
            .body(Full::default())
            .map_err(|error| broken(io::Error::other(error)))?;
        let answered = timeout(patience, async {
            let response = self.sender.send_request(request).await?;
            let (head, body) = response.into_parts();
            Ok::<_, hyper::Error>((head.status, body.collect().await?.to_bytes()))
        })
        .await
        .map_err(|_| broken(io::ErrorKind::TimedOut.into()))?;
        let (status, body) = answered.map_err(|error| broken(io::Error::other(error)))?;
        if status.is_success() {
            return serde_json::from_slice(&body).map_err(|error| broken(error.into()));
        }
        if status == StatusCode::UNPROCESSABLE_ENTITY
            && let Ok(refused) = serde_json::from_slice::<Refused>(&body)
        {
            return Err(AskError::Refused(refused.error));
        }
        let text = String::from_utf8_lossy(&body).trim().to_owned();
        Err(broken(io::Error::other(text)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_named_goes_over_what_is_usual() {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("agentd.toml");
        std::fs::write(&config, "control_socket = \"c.sock\"\nnonsense = 1\n").unwrap();
        let find = |named: Option<&str>, state: Option<&str>, config: Option<&Path>| {
            places(
                named.map(PathBuf::from),
                state.map(Path::new),
                config,
                Some(Path::new("/usual")),
                |_| None,
                false,
            )
        };
        assert_eq!(find(Some("/a"), Some("/b"), Some(&config)), [PathBuf::from("/a")]);
        assert_eq!(find(None, Some("/b"), Some(&config)), [PathBuf::from("/b/control.sock")]);
        assert_eq!(find(None, None, Some(&config)), [folder.path().join("c.sock")]);
        assert_eq!(
            find(None, None, Some(Path::new("/none"))),
            [PathBuf::from("/run/agentd/control.sock"), PathBuf::from("/usual/control.sock")]
        );
    }
}
