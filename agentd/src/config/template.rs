//! Values with `${…}` in them.

use std::fmt;

/// Something that is known of each request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variable {
    /// The address of the public client, as the edge vouches for it.
    ClientIp,
    /// The request's id.
    RequestId,
    /// The tunnel's name.
    Tunnel,
    /// The visitor, where one is known.
    User,
    /// Path and query as the public client wrote them, without what was taken off in path mode.
    Target,
}

const VARIABLES: [(&str, Variable); 5] = [
    ("client_ip", Variable::ClientIp),
    ("request_id", Variable::RequestId),
    ("tunnel", Variable::Tunnel),
    ("user", Variable::User),
    ("target", Variable::Target),
];

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Text(String),
    Variable(Variable),
}

/// A value that is filled in for each request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template(Vec<Piece>);

impl Template {
    /// Reads a value.
    ///
    /// # Errors
    ///
    /// A sentence for the user.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.bytes().any(|b| b.is_ascii_control() && b != b'\t') {
            return Err(format!("{text:?} has a character that no field's value may have"));
        }
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some((before, from)) = rest.split_once("${") {
            let known: Vec<_> = VARIABLES.iter().map(|(name, _)| format!("${{{name}}}")).collect();
            let (name, after) = from.split_once('}').ok_or_else(|| {
                format!("{text:?} has \"${{\" without \"}}\": known are {}", known.join(" "))
            })?;
            let (_, variable) = VARIABLES.iter().find(|(known, _)| *known == name).ok_or_else(|| {
                format!("${{{name}}} in {text:?} is not known: known are {}", known.join(" "))
            })?;
            if !before.is_empty() {
                pieces.push(Piece::Text(before.to_owned()));
            }
            pieces.push(Piece::Variable(*variable));
            rest = after;
        }
        if !rest.is_empty() {
            pieces.push(Piece::Text(rest.to_owned()));
        }
        Ok(Self(pieces))
    }

    /// The value, with what `of` says of each variable.
    #[must_use]
    pub fn fill<'a>(&self, of: impl Fn(Variable) -> &'a str) -> String {
        let mut filled = String::new();
        for piece in &self.0 {
            filled.push_str(match piece {
                Piece::Text(text) => text,
                Piece::Variable(variable) => of(*variable),
            });
        }
        filled
    }
}

impl fmt::Display for Template {
    /// As it is written in the configuration.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|piece| match piece {
            Piece::Text(text) => f.write_str(text),
            Piece::Variable(variable) => VARIABLES
                .iter()
                .filter(|(_, known)| known == variable)
                .try_for_each(|(name, _)| write!(f, "${{{name}}}")),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_filled_in_and_others_are_faults() {
        let of = |variable| match variable {
            Variable::ClientIp => "192.0.2.7",
            Variable::User => "ann",
            _ => "",
        };
        for (text, filled) in [
            ("", ""),
            ("a $ b", "a $ b"),
            ("${client_ip}", "192.0.2.7"),
            ("by ${user} at ${client_ip}!", "by ann at 192.0.2.7!"),
            ("${request_id}${user}$", "ann$"),
        ] {
            let template = Template::parse(text).unwrap();
            assert_eq!((template.fill(of), template.to_string()), (filled.to_owned(), text.to_owned()));
        }
        for text in ["${", "${user", "${User}", "${}", "a\r\nb: c"] {
            assert!(Template::parse(text).is_err(), "{text}");
        }
    }
}
